"""ACME's firewall, and what sami_plugin needs to know of it."""
