"""What tells the agent that a guest moves."""
