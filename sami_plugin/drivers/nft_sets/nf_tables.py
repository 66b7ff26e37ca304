"""What is asked of the kernel about sets of nf_tables: each request or change as one function of the whole set."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sami_plugin.drivers.linux_conntrack.netlink import Connection, Messages, Torn
from sami_plugin.drivers.nft_sets import elements as nft
from sami_plugin.drivers.nft_sets.elements import Element, Form, NamedSet
from sami_plugin.errors import DeviceFailed

_MOST_TRIES = 5


def form_of(connection: Connection, named: NamedSet) -> Form | None:
    """What the set is like here; None where there is none."""
    request = np.frombuffer(nft.get_set(named), np.uint8)[None, :].copy()
    codes, answers = connection.ask(request)
    if codes[0]:
        if codes[0] in (errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
            return None
        raise DeviceFailed(f"{named.words}: the kernel answers with {code_of(int(codes[0]))}")
    messages = [one for found, _ in answers for one in raw(found)]
    if not messages:
        raise DeviceFailed(f"{named.words}: the kernel says nothing of it")
    return nft.form_of(messages[0])


def elements_of(
    connection: Connection, named: NamedSet, form: Form, addresses: Sequence[bytes]
) -> list[Element | None]:
    """Those with one of these octets in them; None for one that cannot be told.

    A dump that traffic tore is made again.
    """
    request = np.frombuffer(nft.dump_elements(named), np.uint8)
    for left in reversed(range(_MOST_TRIES)):
        try:
            return [
                element
                for messages in connection.dump(request, nft.NEWSETELEM)
                for one in raw(messages)
                for element in nft.elements_of(one, addresses)
            ]
        except Torn:
            if not left:
                raise
    raise AssertionError


def held(connection: Connection, named: NamedSet, form: Form, keys: Sequence[bytes]) -> list[Element]:
    """What there is of these keys. They are asked for: a dump may run past what is there while others come and go."""
    found: list[Element | None] = []
    for first in range(0, len(keys), nft.MOST_AT_ONCE):
        requests = [nft.get_element(named, key) for key in keys[first : first + nft.MOST_AT_ONCE]]
        codes, answers = connection.ask(np.stack([np.frombuffer(request, np.uint8) for request in requests]))
        if failed := [code for code in codes.tolist() if code not in (0, errno.ENOENT)]:
            raise DeviceFailed(f"{named.words}: the kernel tells no element ({code_of(failed[0])})")
        found += [one for messages, _ in answers for each in raw(messages) for one in nft.elements_of(each, (b"",))]
    return [one for one in found if one is not None]


def is_name(form: Form, key: bytes) -> bool:
    """Whether the kernel calls the element of this key so: it takes keys as they are."""
    return True


def put(
    connection: Connection, named: NamedSet, form: Form, wanted: Mapping[int, Element], former: Sequence[int]
) -> dict[int, int]:
    """Puts in all that the kernel takes, at once; those of `former` take the place of what is there of the same key, in
    the same moment.

    :returns: of those that it does not take, an errno; EBUSY where the set changes all the time.
    """
    left, is_there = dict(wanted), set(former)
    refused: dict[int, int] = {}
    for _ in range(_MOST_TRIES):
        requests, whose = [], []
        for position, element in left.items():
            if position in is_there:
                requests.append(nft.delete_element(named, element.key))
                whose.append(position)
            requests.append(nft.new_element(named, form, element))
            whose.append(position)
        codes = _transacted(connection, requests)
        failed = {position: code for position, code in zip(whose, codes, strict=True) if code}
        if not failed:
            return refused
        for position, code in failed.items():
            if code == errno.ENOENT and position in is_there:
                is_there.remove(position)  # it has ended meanwhile
            else:
                del left[position]
                refused[position] = code
    return refused | dict.fromkeys(left, errno.EBUSY)


def take_out(connection: Connection, named: NamedSet, form: Form, keys: Mapping[int, bytes]) -> list[int]:
    """Takes out elements, and says which were there. :raises DeviceFailed: the kernel does not let them go."""
    left = dict(keys)
    for _ in range(_MOST_TRIES):
        codes = dict(
            zip(left, _transacted(connection, [nft.delete_element(named, key) for key in left.values()]), strict=True)
        )
        if not any(codes.values()):
            return list(left)
        if failed := [code for code in codes.values() if code not in (0, errno.ENOENT)]:
            raise DeviceFailed(f"{named.words}: the kernel removes no element ({code_of(failed[0])})")
        left = {one: key for one, key in left.items() if not codes[one]}  # the others have ended meanwhile
    raise DeviceFailed(f"{named.words}: it changes faster than elements can be removed from it")


def raw(messages: Messages) -> Iterator[bytes]:
    """One after the other."""
    for start, length in zip(messages.starts.tolist(), messages.lengths.tolist(), strict=True):
        yield messages.octets[start : start + length].tobytes()


def code_of(number: int) -> str:
    """An errno's name."""
    return errno.errorcode.get(number, str(number))


def _transacted(connection: Connection, requests: list[bytes]) -> list[int]:
    """Per request an errno; 0 for all, and all is done, or nothing is."""
    if not requests:
        return []
    begin = nft.message(nft.BATCH_BEGIN, 0, 0, resource=nft.SUBSYSTEM >> 8)
    end = nft.message(nft.BATCH_END, 0, 0, resource=nft.SUBSYSTEM >> 8)
    codes = connection.transact([begin, *requests, end])
    return codes[1:-1]
