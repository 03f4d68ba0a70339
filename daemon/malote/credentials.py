"""The secrets of the servers we log in to, read anew each time: a password file or token may have been renewed."""

from __future__ import annotations

from malote.config import AccountConfig, UpstreamConfig
from malote.core.gateway_word import GatewayKey, parse_keys
from malote.errors import FormatError, SecretUnavailable
from malote.private_files import read_credential, read_private_file, run_token_command
from malote.smtp.relay import Credentials


async def upstream_credentials(config: UpstreamConfig) -> Credentials:
    """Raises `SecretUnavailable`."""
    if config.token_command:
        return Credentials(config.username, token=await run_token_command(config.token_command))
    if config.password_file is None:
        raise SecretUnavailable("outgoing.upstream.password_file: must be set with username")
    return Credentials(config.username, password=_text(read_private_file(config.password_file)))


async def account_password(account: AccountConfig) -> str:
    """Raises `SecretUnavailable`."""
    if account.credential:
        return _text(read_credential(account.credential))
    if account.password_file is None:
        raise SecretUnavailable(f"account {account.name}: set exactly one of password_file, credential, token_command")
    return _text(read_private_file(account.password_file))


def trusted_gateways(account: AccountConfig) -> tuple[GatewayKey, ...]:
    """Of the files that `malote gateway export` wrote. Raises `SecretUnavailable`."""
    keys: list[GatewayKey] = []
    for path in account.trusted_gateways:
        try:
            keys += parse_keys(_text(read_private_file(path)))
        except FormatError as error:
            raise SecretUnavailable(f"{path}: {error}", hint="it must be a file that malote gateway export has written") from None
    return tuple(keys)


def _text(secret: bytes) -> str:
    try:
        return secret.decode()
    except UnicodeDecodeError:
        raise SecretUnavailable("a password file or credential is not UTF-8 text") from None
