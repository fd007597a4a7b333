"""A mail server for tests. It appends each message that it accepts to a file, as one line of JSON.

usage: server.py PORT FILE [--mode starttls|tls|none] [--certificate PEM --key PEM] [--user NAME --password TEXT]
"""

import argparse
import asyncio
import json
import ssl
import sys

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword


class Recorder:
    """Accepts all messages, except those to a recipient whose name begins with `refused`."""

    def __init__(self, path):
        self.path = path

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith("refused"):
            return "550 5.1.1 no such user here"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        record = {
            "from": envelope.mail_from,
            "to": envelope.rcpt_tos,
            "text": envelope.content.decode(),
            # `session.ssl` is set by STARTTLS only.
            "tls": bool(session.ssl or server.transport.get_extra_info("ssl_object")),
            "user": session.auth_data.login.decode() if session.auth_data else None,
            "hello": session.host_name,
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return "250 2.0.0 message taken"


class Listener(Controller):
    """Serves on one port, with TLS from the beginning if `wrapped`."""

    def __init__(self, handler, port, smtp, wrapped=None):
        super().__init__(handler, hostname="127.0.0.1", port=port, ssl_context=wrapped)
        self.smtp = smtp

    def factory(self):
        return SMTP(self.handler, hostname="mail.test", **self.smtp)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("file")
    parser.add_argument("--mode", default="none", choices=["starttls", "tls", "none"])
    parser.add_argument("--certificate")
    parser.add_argument("--key")
    parser.add_argument("--user")
    parser.add_argument("--password")
    options = parser.parse_args()
    context = None
    if options.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.certificate, options.key)
    smtp = {"auth_require_tls": False}
    if options.mode == "starttls":
        smtp |= {"tls_context": context, "require_starttls": True, "auth_require_tls": True}
    if options.user:

        def authenticate(server, session, envelope, mechanism, data):
            expected = LoginPassword(options.user.encode(), options.password.encode())
            return AuthResult(success=data == expected, handled=False, auth_data=data)

        smtp |= {"auth_required": True, "authenticator": authenticate}
    listener = Listener(Recorder(options.file), options.port, smtp, context if options.mode == "tls" else None)
    listener.start()
    print("ready", flush=True)
    try:
        asyncio.new_event_loop().run_forever()
    except KeyboardInterrupt:
        sys.exit(0)


main()
