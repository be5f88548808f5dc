"""What every test can rely on: hypothesis draws the same examples each time and never fails for being slow; signals are
not ignored because whoever started the tests ignores them (nohup, a shell's background job), which children inherit.
"""

from __future__ import annotations

import signal

from hypothesis import settings

settings.register_profile("bagel_ds", deadline=None, derandomize=True)
settings.load_profile("bagel_ds")

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)
