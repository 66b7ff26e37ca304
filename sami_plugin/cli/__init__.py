"""The command line: one module per noun, one class per command.

A command's module is loaded to show one line of help, so it imports only what is light; what a command works with is
imported when it works.
"""
