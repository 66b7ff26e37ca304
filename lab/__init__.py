"""n hosts with stateful firewalls on one machine: guests with real processes that move between them.

Start at `lab.lab.Lab`; everything runs inside namespaces of its own, see `lab.isolation`. All but `lab.carrier`, the
glue, imports nothing of sami_plugin, so it can judge it. This file stays empty of imports: `lab.isolation` must start
before anything has threads.
"""
