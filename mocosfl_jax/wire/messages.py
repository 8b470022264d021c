"""The messages of schema.proto.

They are made from the compiled schema when this module is imported, so any version of protobuf will do.
"""

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "mocosfl_jax.Federation"
PROTOCOL = 1  # changes whenever an older client or server would misunderstand the other

_POOL = descriptor_pool.DescriptorPool()
_SCHEMA = (resources.files("mocosfl_jax.wire") / "schema.binpb").read_bytes()
for _file in descriptor_pb2.FileDescriptorSet.FromString(_SCHEMA).file:
    _POOL.Add(_file)


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"mocosfl_jax.{name}"))


FromClient, ToClient = _message("FromClient"), _message("ToClient")
Hello, Welcome, Holding = _message("Hello"), _message("Welcome"), _message("Holding")
Contract, Ready, Goodbye = _message("Contract"), _message("Ready"), _message("Goodbye")
Forward, Smashed, Backward = _message("Forward"), _message("Smashed"), _message("Backward")
Collect, State = _message("Collect"), _message("State")
Array, Leaves = _message("Array"), _message("Leaves")

# The parts of a client's state: fields of `State`, of `Collect` and of `ClientState`.
PARTS = ("params", "key_params", "opt_state")


def array_bytes(message: Any) -> int:
    """Bytes of the arrays in a message of either side; the rest is names of fields, numbers and lengths."""
    kind = message.WhichOneof("content")
    content = getattr(message, kind)
    if kind == "smashed":
        return len(content.query.data) + len(content.key.data)
    if kind == "backward":
        return len(content.gradient.data)
    if kind in ("load", "state"):
        return sum(len(data) for part in PARTS for data in getattr(content, part).data)
    return 0
