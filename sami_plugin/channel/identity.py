"""Who a host is: its certificate, and whom it trusts to say who others are.

A host's name stands in its certificate as a URI among the subject's alternative names, ``sami://NAME``, with what a URI
does not take percent-encoded (RFC 3986, section 2.1). Nothing else of a certificate says who it is. `sami pki` makes
such certificates; those of any other authority do as well.
"""

from __future__ import annotations

import datetime
import logging
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

from cryptography import x509

from sami_plugin.errors import ConfigurationError, NotAuthorised
from sami_plugin.model.settings import Files

LOG = logging.getLogger(__name__)

SCHEME = "sami://"
AGAIN_SECONDS = 1.0
"""Between two looks at files that did not do: a clock may be set, and a certificate begin to count."""


def uri_of(host: str) -> str:
    """How a host's name stands in its certificate."""
    return SCHEME + quote(host, safe="")


def host_of(uris: list[str]) -> str:
    """The one host that these URIs of a certificate name.

    :raises NotAuthorised: it is none, or more than one.
    """
    hosts = [unquote(uri.removeprefix(SCHEME)) for uri in uris if uri.startswith(SCHEME)]
    if len(hosts) != 1 or uri_of(hosts[0]) not in uris or not hosts[0]:
        raise NotAuthorised(f"its certificate has to name one host as {SCHEME}NAME, and names {uris or 'none'}")
    return hosts[0]


class Credentials:
    """A host's own certificate and key, and whom it trusts. Thread-safe.

    The files are read again when they change. While they do not fit together, as in the middle of a change, what was
    read before goes on to count.
    """

    def __init__(self, host: str, files: Files, group: str = "tls") -> None:
        """`group` is that of the options which name the authorities.

        :raises ConfigurationError: as `check`.
        """
        self.host = host
        self.files = files
        self._group = group
        self._lock = threading.Lock()
        self._read_at = self._stamp()
        self._contexts = self._load()
        self._complaint = ""
        """Why the files as they are do not do; then they are tried again."""
        self._again_at = 0.0

    def check(self) -> None:
        """Whether the files as they are now would do.

        :raises ConfigurationError: one is missing, does not fit the others, names another host, is out of date, or
            others than the agent may read the key; says which and what to do.
        """
        self._load()

    def certificate(self) -> x509.Certificate:
        """The host's own, as it is in the file.

        :raises ConfigurationError: there is none.
        """
        path = self.files.certificate
        try:
            return x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"[tls] certificate: {path}: {_words(error)}; `sami pki issue` makes one"
            ) from error

    def context(self, *, is_server: bool) -> ssl.SSLContext:
        """For one handshake."""
        with self._lock:
            stamp, now = self._stamp(), time.monotonic()
            if stamp != self._read_at or (self._complaint and now >= self._again_at):
                self._read_at, self._again_at = stamp, now + AGAIN_SECONDS
                try:
                    self._contexts, self._complaint = self._load(), ""
                    LOG.info("%s: the certificates were read again", self.host)
                except ConfigurationError as error:
                    if str(error) != self._complaint:
                        LOG.error("%s: what was read before goes on to count: %s", self.host, error)
                    self._complaint = str(error)
            return self._contexts[is_server]

    def _stamp(self) -> list[tuple[int, ...] | None]:
        return [_stamp_of(path) for path in _paths(self.files)]

    def _load(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """For a client and for a server."""
        certificate = self.certificate()
        try:
            named = host_of(uris_of(certificate))
        except NotAuthorised as error:
            raise ConfigurationError(f"[tls] certificate: {self.files.certificate}: {error}") from error
        if named != self.host:
            raise ConfigurationError(
                f"[tls] certificate: {self.files.certificate} is that of {named}, and [agent] host is {self.host}"
            )
        if not _begin(certificate) <= _now() < _end(certificate):
            raise ConfigurationError(
                f"[tls] certificate: {self.files.certificate} counts from {_begin(certificate):%Y-%m-%d %H:%M} to "
                f"{_end(certificate):%Y-%m-%d %H:%M} UTC, which is not now; renew it, or set this host's clock"
            )
        _refuse_open_key(self.files.key)
        return self._context(ssl.PROTOCOL_TLS_CLIENT), self._context(ssl.PROTOCOL_TLS_SERVER)

    def _context(self, protocol: ssl._SSLMethod) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # a host is no DNS name; `host_of` says who it is
        context.verify_mode = ssl.CERT_REQUIRED
        if protocol is ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # nobody resumes: one handshake serves a session
        with _named("[tls] key", self.files.key):
            # An empty password, or OpenSSL asks for it on the terminal.
            context.load_cert_chain(self.files.certificate, self.files.key, password="")
        with _named(f"[{self._group}] authorities", self.files.authorities):
            context.load_verify_locations(self.files.authorities)
        if self.files.revoked is not None:
            with _named(f"[{self._group}] revoked", self.files.revoked):
                context.load_verify_locations(self.files.revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        return context


def uris_of(certificate: x509.Certificate) -> list[str]:
    """The URIs among the alternative names of its subject."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def days_until(moment: datetime.datetime) -> float:
    """From now; negative when it is past."""
    return (moment - _now()) / datetime.timedelta(days=1)


def utc(of: object, name: str) -> datetime.datetime:
    """A time of a certificate or of a list of revoked ones. Before 42, cryptography has none that knows its zone."""
    if hasattr(of, f"{name}_utc"):
        found: datetime.datetime = getattr(of, f"{name}_utc")
    else:
        found = getattr(of, name).replace(tzinfo=datetime.UTC)
    return found


def _begin(certificate: x509.Certificate) -> datetime.datetime:
    return utc(certificate, "not_valid_before")


def _end(certificate: x509.Certificate) -> datetime.datetime:
    return utc(certificate, "not_valid_after")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _refuse_open_key(path: Path) -> None:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigurationError(f"[tls] key: {path}: {_words(error)}") from error
    if mode & 0o077:
        raise ConfigurationError(f"[tls] key: {path}: others may read it (mode {mode:04o}); chmod 600 {path}")


@contextmanager
def _named(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{option}: {path}: {_words(error)}") from error


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):  # an OSError, whose errno is another story
        return (error.reason or str(error)).replace("_", " ").lower()
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _paths(files: Files) -> list[Path]:
    return [path for path in (files.certificate, files.key, files.authorities, files.revoked) if path is not None]


def _stamp_of(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
