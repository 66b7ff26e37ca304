"""What a guest of the OpenStack lab is told when it asks for its address; no lab is needed."""

from __future__ import annotations

import socket

from lab.openstack import dhcp
from lab.openstack.dhcp import ACKNOWLEDGEMENT, COOKIE, DISCOVER, HEAD, KIND, OFFER, REQUEST, Lease, answer

MAC = "fa:16:3e:00:01:0b"
TRANSACTION = 0x12345678
LEASES = {MAC: Lease("10.94.1.11", "10.94.1.254")}


def message(kind: int, mac: str = MAC) -> bytes:
    octets = bytes.fromhex(mac.replace(":", ""))
    nobody = bytes(4)
    head = HEAD.pack(1, 1, 6, 0, TRANSACTION, 0, 0, nobody, nobody, nobody, nobody, octets, COOKIE)
    return head + bytes([dhcp.PAD, KIND, 1, kind, dhcp.END])


def options(said: bytes) -> dict[int, bytes]:
    return dict(dhcp._options(said))


def test_guest_that_looks_is_offered_what_is_known_of_its_hardware_address() -> None:
    said = answer(message(DISCOVER), LEASES.get)
    assert said is not None
    operation, _, _, _, transaction, _, _, _, address, *_, mac, _ = HEAD.unpack_from(said)
    assert (operation, transaction, mac[:6].hex(":")) == (dhcp.BOOT_REPLY, TRANSACTION, MAC)
    assert socket.inet_ntoa(address) == "10.94.1.11"
    assert options(said)[KIND] == bytes([OFFER])
    assert socket.inet_ntoa(options(said)[dhcp.ROUTER]) == "10.94.1.254"
    assert socket.inet_ntoa(options(said)[dhcp.MASK]) == "255.255.255.0"


def test_guest_that_asks_for_it_gets_it() -> None:
    said = answer(message(REQUEST), LEASES.get)
    assert said is not None
    assert options(said)[KIND] == bytes([ACKNOWLEDGEMENT])


def test_nobody_answers_a_stranger_or_what_is_no_question() -> None:
    assert answer(message(DISCOVER, "fa:16:3e:00:01:0c"), LEASES.get) is None
    assert answer(message(ACKNOWLEDGEMENT), LEASES.get) is None
    assert answer(bytes(300), LEASES.get) is None
    for size in range(len(message(DISCOVER)) - 2):
        assert answer(message(DISCOVER)[:size], LEASES.get) is None
