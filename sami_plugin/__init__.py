"""Moves the state that firewalls hold about a guest to the host that the guest is live-migrated to."""
