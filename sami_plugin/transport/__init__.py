"""Carries numbered, opaque messages from agent to agent."""
