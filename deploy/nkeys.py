"""Creates nkeys, the Ed25519 keys of NATS, with openssl. A seed is the private key in NATS's text format; the public key
follows from it."""

import base64
import binascii
import secrets
import subprocess
import sys

# The first byte of a key states its type: a user's key begins with U, an account's with A.
USER, ACCOUNT = 20 << 3, 0
SEED = 18 << 3
# A private key in the format PKCS #8 consists of this prefix and 32 bytes; a public key ends with its 32 bytes.
PKCS8 = bytes.fromhex("302e020100300506032b657004220420")


def seed(kind: int) -> str:
    """Returns a new seed of a user or an account."""
    head = bytes([SEED | kind >> 5, (kind & 31) << 3])
    return encode(head + secrets.token_bytes(32))


def public_key(text: str) -> str:
    """Returns the public key of a seed."""
    raw = base64.b32decode(text + "=" * (-len(text) % 8))
    kind = (raw[0] & 7) << 5 | raw[1] >> 3
    # The private key goes through a pipe, because other users can read arguments.
    command = ["openssl", "pkey", "-inform", "DER", "-pubout", "-outform", "DER"]
    done = subprocess.run(command, input=PKCS8 + raw[2:34], capture_output=True)
    if done.returncode != 0:
        sys.exit(f"deploy/secrets: openssl pkey failed: {done.stderr.decode().strip()}")
    return encode(bytes([kind]) + done.stdout[-32:])


def encode(raw: bytes) -> str:
    """Returns the bytes and their checksum (CRC-16, XMODEM) in base 32."""
    checksum = binascii.crc_hqx(raw, 0).to_bytes(2, "little")
    return base64.b32encode(raw + checksum).decode().rstrip("=")
