"""A certificate authority in a folder, for those who have none: what `sami pki` works on.

ca.pem              the authority's certificate: goes to every host
ca.key              its key: whoever has it can be any host, so it stays where it is
crl.pem             the certificates that count no more: goes to every host, anew after each change
issued/SERIAL.pem   each certificate that was issued; of the keys none is kept
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sami_plugin.channel.identity import host_of, uri_of, uris_of, utc
from sami_plugin.errors import ConfigurationError, NotAuthorised

AUTHORITY_DAYS, HOST_DAYS = 3650, 365
SKEW = datetime.timedelta(hours=1)
"""A new certificate counts since so long, for the hosts' clocks may differ."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that the authority issued."""

    host: str
    serial: str
    """In hexadecimal, as OpenSSL prints it."""
    ends: datetime.datetime
    is_revoked: bool


class Authority:
    """The authority of one folder. Not for two processes at a time."""

    def __init__(self, folder: Path) -> None:
        """:raises ConfigurationError: there is none, or it cannot be read."""
        self.folder = folder
        try:
            self._certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
            key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
            self._revoked = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
        except FileNotFoundError as error:
            raise ConfigurationError(f"{error.filename} is not there; `sami pki init` makes an authority") from error
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(f"the authority in {folder} cannot be read: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or _octets(key) != _octets(self._certificate):
            raise ConfigurationError(f"{folder / 'ca.key'} is not the key of ca.pem beside it")
        self._key = key

    @classmethod
    def create(cls, folder: Path, name: str, days: int = AUTHORITY_DAYS) -> Authority:
        """A new one.

        :raises ConfigurationError: there is one already, or the folder cannot be written.
        """
        if (folder / "ca.key").exists():
            raise ConfigurationError(f"{folder} has an authority already; hosts trust it, so it is not replaced")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = _now()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        try:
            (folder / "issued").mkdir(parents=True, exist_ok=True)
            write_file(folder / "ca.pem", certificate.public_bytes(Encoding.PEM))
            write_file(folder / "crl.pem", _list_of((), certificate, key))
            write_file(folder / "ca.key", _pem(key), mode=0o600)  # last: with it the authority is there
        except OSError as error:
            raise ConfigurationError(f"{error.filename}: {error.strerror}") from error
        return cls(folder)

    @property
    def certificate_pem(self) -> bytes:
        """For `[tls] authorities`."""
        return self._certificate.public_bytes(Encoding.PEM)

    @property
    def revoked_pem(self) -> bytes:
        """For `[tls] revoked`."""
        return self._revoked.public_bytes(Encoding.PEM)

    def issue(self, host: str, days: int = HOST_DAYS) -> tuple[bytes, bytes]:
        """A new certificate of a host, and its key, which is nowhere else; both in PEM.

        :raises ConfigurationError: it would outlive the authority, or cannot be noted.
        """
        now = _now()
        ends = now + datetime.timedelta(days=days)
        if ends > utc(self._certificate, "not_valid_after"):
            raise ConfigurationError(
                f"the authority itself ends on {utc(self._certificate, 'not_valid_after'):%Y-%m-%d}; "
                "let the certificate end before"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        authority = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(ends)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri_of(host))]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = certificate.public_bytes(Encoding.PEM)
        self._write(Path("issued") / f"{serial_of(certificate)}.pem", pem)
        return pem, _pem(key)

    def revoke(self, serials: Iterable[str]) -> None:
        """From now on these certificates count no more, wherever `crl.pem` is brought."""
        known = {revoked.serial_number for revoked in self._revoked}
        pem = _list_of(known | {int(serial, 16) for serial in serials}, self._certificate, self._key)
        self._write(Path("crl.pem"), pem)
        self._revoked = x509.load_pem_x509_crl(pem)

    def issued(self) -> list[Issued]:
        """What it issued, by host and then by end."""
        return sorted(self._issued(), key=lambda issued: (issued.host, issued.ends))

    def _issued(self) -> Iterator[Issued]:
        revoked = {one.serial_number for one in self._revoked}
        for path in (self.folder / "issued").glob("*.pem"):
            try:
                certificate = x509.load_pem_x509_certificate(path.read_bytes())
                host = host_of(uris_of(certificate))
            except (OSError, ValueError, NotAuthorised) as error:
                raise ConfigurationError(
                    f"{path}: {error}; it is none of what was issued here, so remove it"
                ) from error
            is_revoked = certificate.serial_number in revoked
            yield Issued(host, serial_of(certificate), utc(certificate, "not_valid_after"), is_revoked)

    def _write(self, name: Path, octets: bytes) -> None:
        try:
            write_file(self.folder / name, octets)
        except OSError as error:
            raise ConfigurationError(f"{self.folder / name}: {error.strerror}") from error


def serial_of(certificate: x509.Certificate) -> str:
    """As OpenSSL prints it."""
    digits = f"{certificate.serial_number:X}"
    return digits.zfill(len(digits) + len(digits) % 2)


def write_file(path: Path, octets: bytes, mode: int = 0o644) -> None:
    """Puts a whole file in its place: whoever reads has the old one or the new one. May be repeated.

    :raises OSError: it cannot be written; the old one is as it was.
    """
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(octets)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


def _list_of(serials: Iterable[int], certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bytes:
    """What has no end: a host that was not given a newer list goes on with the one it has."""
    now = _now()
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(certificate.subject)
        .last_update(now - SKEW)
        .next_update(utc(certificate, "not_valid_after"))
    )
    for serial in sorted(serials):
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - SKEW).build()
        builder = builder.add_revoked_certificate(revoked)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _octets(holder: ec.EllipticCurvePrivateKey | x509.Certificate) -> bytes:
    """Of its public key: before cryptography 41 the keys themselves are never equal."""
    return holder.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _usage(**wanted: bool) -> x509.KeyUsage:
    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: wanted.get(name, False) for name in every})


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
