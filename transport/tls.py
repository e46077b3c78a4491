"""The files with which a server speaks https."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr


@dataclass(frozen=True, slots=True)
class Tls:
    """A certificate with its chain, and its key, as PEM files."""

    certfile: Path
    keyfile: Path | None  # None: the key is in the certificate's file
    password: SecretStr | None = None  # of the key

    def check(self) -> None:
        """Try the files.

        Raises:
            ValueError: they cannot be read or do not belong together; a sentence for a person.
        """
        for flag, file in (("--ssl-certfile", self.certfile), ("--ssl-keyfile", self.keyfile)):
            try:
                if file is not None:
                    file.open("rb").close()
            except OSError as exc:
                raise ValueError(f"{flag}: {file} cannot be read: {exc.strerror or exc}.") from exc
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(self.certfile, self.keyfile, self._password or "")
        except (ssl.SSLError, ValueError) as exc:
            raise ValueError(
                f"--ssl-certfile: {self.certfile} and its key cannot be used ({exc}); both are PEM "
                "files that belong together, and TANDEM_SSL_KEYFILE_PASSWORD opens a locked key."
            ) from exc

    def options(self) -> dict[str, Any]:
        """What uvicorn is given."""
        return {
            "ssl_certfile": self.certfile,
            "ssl_keyfile": self.keyfile,
            "ssl_keyfile_password": self._password,
        }

    @property
    def _password(self) -> str | None:
        return None if self.password is None else self.password.get_secret_value()
