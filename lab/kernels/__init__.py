"""Commands under Debian's kernels, on the machine's own root: what the machine's kernel cannot do, and older ones."""
