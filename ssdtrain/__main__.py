"""Makes `python -m ssdtrain` the same as the `ssdtrain` command."""

from __future__ import annotations

from ssdtrain.tools.cli import main

if __name__ == "__main__":
    main()
