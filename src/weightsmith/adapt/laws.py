"""What holds for the methods of this room.

None is lifted from a kernel, so no law is run over all of them: each has its own tests.
"""
