"""What this host decided and did, on its disk."""
