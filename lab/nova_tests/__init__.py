"""Nova's own tests of live migration, without our notification driver and with it."""
