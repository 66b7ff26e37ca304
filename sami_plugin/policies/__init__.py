"""What is said to a migration that would lose flows: plugins of the namespace ``sami.policies``."""
