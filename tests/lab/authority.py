"""Certificates of clients, as an organisation's own authority makes them."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Authority:
    """A certificate authority of openssl's in a directory."""

    directory: Path

    @property
    def certificate(self) -> Path:
        return self.directory / "ca.pem"

    def make(self) -> Authority:
        self.directory.mkdir()
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                      "-subj", "/CN=Test authority", "-keyout", "ca.key", "-out", "ca.pem")
        return self

    def client(self, name: str, subject: str, alternative: str = "", usage: str = "clientAuth") -> ssl.SSLContext:
        """A context for smtplib that shows this certificate."""
        extensions = f"extendedKeyUsage={usage}\n" + (f"subjectAltName={alternative}\n" if alternative else "")
        (self.directory / f"{name}.ext").write_text(extensions)
        self._openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", subject,
                      "-keyout", f"{name}.key", "-out", f"{name}.csr")
        self._openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
                      "-extfile", f"{name}.ext", "-out", f"{name}.pem")
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        return context

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.directory, check=True, capture_output=True, timeout=30)
