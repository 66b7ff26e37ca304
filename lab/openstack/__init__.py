"""A small OpenStack on one machine: a controller and two compute hosts, and guests that Nova migrates live.

Start at `lab.openstack.lab.OpenStackLab`. `tools/prepare openstack` installs and fetches what it takes
(`lab.openstack.parts`); `python -m lab.openstack.demo` shows what it is for. SAMI comes into it in `lab.openstack.sami`
alone, as an operator puts it on a compute host.
"""
