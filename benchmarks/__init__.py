"""How fast, beside what the machine can do at best."""
