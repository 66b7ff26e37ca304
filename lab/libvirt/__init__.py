"""Hosts with a real libvirtd each on one machine, and real QEMU guests that migrate live between them.

Start at `lab.libvirt.lab.LibvirtLab`. `tools/prepare libvirt` installs and fetches what it takes (`lab.libvirt.parts`);
`python -m lab.libvirt up` brings up a lab to look at. Nothing here imports sami_plugin.
"""
