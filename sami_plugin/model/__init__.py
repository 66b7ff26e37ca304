"""The words that all stages share: plain values without I/O, clocks or threads."""
