"""The Tempest plugin: tests of a cloud that runs SAMI, from the outside."""
