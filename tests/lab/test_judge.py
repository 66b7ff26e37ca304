import pytest

from lab.judge import Flow, Table, missing, parse

LINES = [
    (
        "ipv4     2 tcp      6 431999 ESTABLISHED src=10.92.0.11 dst=10.92.0.254 sport=4 dport=80 "
        "src=10.92.0.254 dst=10.92.0.11 sport=80 dport=4 [ASSURED] mark=0 zone=4097 use=1 id=17\n"
    ),
    (
        "ipv4     2 udp      17 3 src=10.92.0.11 dst=10.92.0.254 sport=5 dport=53 packets=1 bytes=32 [UNREPLIED] "
        "src=10.92.0.254 dst=10.92.0.11 sport=53 dport=5 packets=0 bytes=0 mark=0 zone=4097 use=1 id=18\n"
    ),
    (
        "ipv6     10 icmpv6   58 29 src=fd92::b dst=fd92::fe type=128 code=0 id=57 "
        "src=fd92::fe dst=fd92::b type=129 code=0 id=57 mark=0 zone=4097 use=1 id=19\n"
    ),
    (
        "ipv4     2 tcp      6 src=10.92.0.11 dst=10.92.0.254 sport=6 dport=80 "
        "src=10.92.0.254 dst=10.92.0.77 sport=80 dport=6 [OFFLOAD] mark=0 use=1\n"
    ),
]
TCP = Flow("ipv4", "tcp", "10.92.0.11", "10.92.0.254", ("4", "80"))
UDP = Flow("ipv4", "udp", "10.92.0.11", "10.92.0.254", ("5", "53"))
ICMP = Flow("ipv6", "icmpv6", "fd92::b", "fd92::fe", ("128", "0", "57"))
OFFLOADED = Flow("ipv4", "tcp", "10.92.0.11", "10.92.0.254", ("6", "80"))


def test_every_kind_of_line_is_read():
    entries = parse(LINES)
    assert set(entries) == {TCP, UDP, ICMP, OFFLOADED}
    assert [entries[flow].timeout_seconds for flow in (TCP, UDP, ICMP, OFFLOADED)] == [431999, 3, 29, None]
    assert [entries[flow].id for flow in (TCP, UDP, ICMP, OFFLOADED)] == [17, 18, 19, None]


def test_a_line_that_is_no_entry_is_refused():
    with pytest.raises(ValueError, match="not an entry"):
        parse(["conntrack v1.4.7\n"])


def test_what_ran_out_by_itself_is_not_missing():
    entries = parse(LINES)
    assert missing(Table(10.0, entries), Table(14.0, {})) == {TCP, ICMP, OFFLOADED}
    assert missing(Table(10.0, entries), Table(12.0, {TCP: entries[TCP]})) == {UDP, ICMP, OFFLOADED}


def test_an_address_is_found_at_every_end():
    table = Table(0.0, parse(LINES))
    assert table.of({"10.92.0.77"}) == {OFFLOADED}
    assert table.of({"10.92.0.11", "fd92::b"}) == {TCP, UDP, ICMP, OFFLOADED}
    assert table.of({"10.92.0.11"}, not_with={"10.92.0.77"}) == {TCP, UDP}
    assert table.of(set()) == set()
