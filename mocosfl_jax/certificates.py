"""Make the certificates of a federation of real clients.

    python -m mocosfl_jax.certificates --tls=FOLDER --clients=N --hosts=NAME[,NAME ...]

  --tls=FOLDER  a new folder: keys and certificates of the server, and a folder for each client
  --clients=N   the number of clients
  --hosts=NAME  names and addresses by which the clients will reach the server (default: localhost,127.0.0.1)

Give each client its own folder, FOLDER/client-NUMBER, and nothing else. The key of the authority,
FOLDER/authority.key, is needed only to make further certificates.
"""

import ipaddress
import re
import sys
from collections.abc import Sequence

from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import user_path
from mocosfl_jax.wire.endpoint import require_wire

USAGE = "--tls=FOLDER, --clients=N, --hosts=NAME,NAME, --help"


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status, see `commandline.answer`."""
    return commandline.answer(argv, __doc__ or "", make)


def make(argv: Sequence[str]) -> None:
    """Make the certificates requested on the command line.

    Raises:
      UserError: if an argument is wrong, or the folder is not empty.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("tls", None, "Folder of the certificates.", flag_values=values)
        flags.DEFINE_integer("clients", None, "Number of clients.", 1, flag_values=values)
        flags.DEFINE_list("hosts", ["localhost", "127.0.0.1"], "Names of the server.", flag_values=values)

    values = commandline.parse_flags(argv, USAGE, define, required=["tls", "clients"])
    for host in values.hosts or [""]:
        if not is_host(host):
            raise UserError(f"--hosts: found {host!r}, allowed: names and addresses, without ports")
    require_wire()
    from mocosfl_jax.wire.certificates import DAYS, make_folder

    folder = user_path("--tls", values.tls)
    make_folder(folder, values.hosts, values.clients)
    say(
        f"{folder}: certificates of {values.clients:,} clients and of the server {', '.join(values.hosts)}, "
        f"valid for {DAYS} days"
    )


def is_host(text: str) -> bool:
    """Whether this is an address, or a name as certificates have them.

    Example:
      >>> [is_host(text) for text in ("a.example.org", "10.0.0.1", "::1", "a.example.org:8000", "")]
      [True, True, True, False, False]
    """
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return re.fullmatch(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?", text) is not None
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv))
