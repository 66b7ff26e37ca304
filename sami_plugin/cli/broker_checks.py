"""What `sami doctor` finds out about a broker, without the name and the password that it asks for."""

from __future__ import annotations

import socket
import ssl
from contextlib import ExitStack

from sami_plugin import errors
from sami_plugin.cli.checks import Check, Result

_WAIT_SECONDS = 2.0


def broker(url: str, *, is_tls: bool) -> Check:
    """Whether it is one that this version may use, and speaks AMQP; `is_tls` where the URL does not say."""
    import oslo_messaging
    from oslo_config import cfg, types

    from sami_plugin.transport.rpc import refuse_unknown_broker

    name = "broker"
    mend = "set [DEFAULT] transport_url, for example rabbit://NAME:PASSWORD@127.0.0.1:5672/"
    if url.partition("://")[2].strip("/") == "" and not url.startswith("fake:"):
        return Check(name, Result.MISSING, f"transport_url: {url} names no broker", mend)
    try:
        refuse_unknown_broker(url)
        parsed = oslo_messaging.TransportURL.parse(cfg.ConfigOpts(), url) if not url.startswith("fake:") else None
        if parsed is not None and "ssl" in parsed.query:
            is_tls = types.Boolean()(parsed.query["ssl"])
    except errors.ConfigurationError as error:
        return Check(name, Result.MISSING, str(error), mend)
    except (oslo_messaging.InvalidTransportURL, ValueError) as error:
        return Check(name, Result.MISSING, f"transport_url: {error}", mend)
    if parsed is None:
        return Check(name, Result.LIMITED, "fake:// carries messages within one process only: for tests", mend)
    places = [(host.hostname or "", host.port or 5672) for host in parsed.hosts]
    silent = [f"{place}:{port}: {why}" for place, port in places if (why := _amqp_silence(place, port, is_tls))]
    if len(silent) == len(places):
        return Check(name, Result.MISSING, f"no broker answers: {'; '.join(silent)}", "start RabbitMQ")
    if silent:
        return Check(name, Result.LIMITED, f"some brokers do not answer: {'; '.join(silent)}", "start them")
    where = ", ".join(f"{place}:{port}" for place, port in places)
    spoken, untried = ("AMQP through TLS", "certificate, name") if is_tls else ("AMQP", "name")
    return Check(name, Result.OK, f"{where} speaks {spoken}; {untried} and password were not tried")


def _amqp_silence(host: str, port: int, is_tls: bool) -> str:
    """Why nothing that speaks AMQP 0-9-1 is there; empty if something is."""
    try:
        with ExitStack() as stack:
            tried = stack.enter_context(socket.create_connection((host, port), _WAIT_SECONDS))
            if is_tls:
                tried = stack.enter_context(_believing().wrap_socket(tried, server_hostname=host))
            tried.sendall(b"AMQP\x00\x00\x09\x01")
            answer = tried.recv(8)
    except ssl.SSLError as error:
        return f"no TLS: {error.reason or error}"
    except OSError as error:
        return error.strerror or str(error)
    # Connection.Start is a method frame on channel 0; what knows another version answers with its own header.
    return "" if answer[:3] == b"\x01\x00\x00" else "something else than AMQP 0-9-1 answers"


def _believing() -> ssl.SSLContext:
    """Whatever certificate is shown: it is oslo.messaging that judges it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
