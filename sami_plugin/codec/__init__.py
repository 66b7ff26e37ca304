"""Flow state and messages as bytes, and back. No I/O."""
