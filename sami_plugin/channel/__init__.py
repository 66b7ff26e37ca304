"""What makes a conversation of two hosts out of messages that any broker may lose, repeat and reorder. No I/O."""
