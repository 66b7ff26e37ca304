"""What to do, and when: plain decisions without I/O, clocks or threads."""
