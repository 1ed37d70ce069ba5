"""A certificate that vouches for itself, for tests of connections by TLS."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

CAN_BE_MADE = shutil.which("openssl") is not None


def certificate(folder: Path) -> dict[str, Any]:
    """Makes one; the settings of `cluster` that name it."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return {"tls_ca_file": str(cert), "tls_cert": str(cert), "tls_key": str(key)}
