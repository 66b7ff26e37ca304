"""Scope finders: where a port's state lives on this host."""
