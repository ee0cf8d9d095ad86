"""Devices behind TVM's RPC: servers, alone or at a tracker, from which a free one is leased.

Not TVM's own session carries the work but a worker program that the server starts beside it, as
sshd would (`session`, `client`): a kernel that crashes or hangs takes only that program with it,
the clock is read on the device by our own protocol, and what comes back is framed, limited JSON.

| module  | runs                                                                |
|---------|---------------------------------------------------------------------|
| server  | on the device, `hwmpq devices serve`: offers itself, takes clients  |
| session | on the device, one process per client                               |
| client  | here, one killable process per lease: stdin and stdout are the worker's |
| pool    | here, in the run: lease, probe, retry elsewhere, quarantine         |
| wire    | everywhere: handshake and tracker messages with deadlines           |

TVM's server is not used: it serves nobody any more after one crashed session or one empty key, and
waits for ever on a peer that says nothing. RPC has neither authentication nor encryption: whoever
reaches the port runs programs there.
"""
