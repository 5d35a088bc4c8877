"""Who is at the other end of a control connection, and whether they may control l40sd."""

import grp
import os
import pwd
import socket
import struct

from aiohttp import web


def peer_of(request: web.Request) -> tuple[int, int]:
    """Return the uid and pid at the other end of the socket, as the kernel knows them."""
    connection = request.transport.get_extra_info("socket") if request.transport else None
    if connection is None:
        return -1, 0
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid, pid


def user_of(request: web.Request) -> str:
    """Return the name of the user at the other end; their number where nobody has it."""
    uid, _ = peer_of(request)
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def may_control(uid: int, group: str) -> bool:
    """Return whether this user may use the control API: root, the daemon's own user, or a member of the group."""
    if uid in (0, os.geteuid()):
        return True

    try:
        user = pwd.getpwuid(uid)
        return grp.getgrnam(group).gr_gid in os.getgrouplist(user.pw_name, user.pw_gid)
    except KeyError:
        return False
