"""A local page to browse checkpoints with: what is in them, what the values are like, what changed.

``weightsmith look A B`` opens it. The signature of this part: a question (`answers`: which tensor, of
which checkpoint, seen how) goes to a number of JSON answers, each computed when it is asked for, in
bounded memory, at most two at a time. Only this machine, and only who has the address, can ask.
"""

from weightsmith.look._server import Server

__all__ = ["Server"]
