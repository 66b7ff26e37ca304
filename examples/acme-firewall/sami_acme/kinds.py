"""What only ACME's firewalls know: whom a guest has barred, why, and how sure the firewall is of it."""

from sami_plugin.model.flows import Template
from sami_plugin.model.information_elements import DataType, InformationElement, Origin, Semantics, Units
from sami_plugin.model.kinds import Kinds

ENTERPRISE = 0xFFFF_FFFE
"""A number that IANA has given nobody; a vendor writes here its own."""


def _element(name, number, data_type, description):
    about = Semantics.DEFAULT, Units.NONE, Origin.VENDOR, description
    return InformationElement(name, number, data_type, *about, vendor=ENTERPRISE)


def _ban(family, form):
    addresses = [(f"{end}{family}Address", *form) for end in ("source", "destination")]
    state = (("flowId", ">u4"), ("remainingTimeoutSeconds", ">u4"), ("acmeReason", ">u2"), ("acmeScore", "u1"))
    words = f"{{{addresses[1][0]}}} by {{{addresses[0][0]}}}"
    key = (("zoneRole", "u1"), *addresses)
    return Template(f"acme-ban-{family.lower()}", key, state, (addresses[0][0],), words, is_renewed=False)


BANS = (_ban("IPv4", (">u4",)), _ban("IPv6", (">u8", (2,))))
KINDS = Kinds(
    BANS,
    (
        _element("acmeReason", 1, DataType.UNSIGNED16, "The rule of ACME's that barred the address."),
        _element("acmeScore", 2, DataType.UNSIGNED8, "How sure it is, of 100."),
    ),
)
