"""Firewall drivers. `base` is their contract, `loader` finds them by stevedore's name."""
