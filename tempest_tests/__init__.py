"""The Tempest plugin: tests of a cloud that runs SAMI, from the outside.

Empty today. Still to come: the plugin class with its ``tempest.test_plugins`` entry point, and scenarios that
live-migrate a server while its connections are open and look whether they last.
"""
