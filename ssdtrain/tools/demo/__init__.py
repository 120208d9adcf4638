"""The demonstration: one GPT trained side by side without and with ssdtrain, and what it cost.

Knows public names only. `ssdtrain demo` is the way in. The parent process (`compare`, `process`, `report`) never
imports torch; the two child processes (`worker`, `model`, `text`, `saved`, `memory`) do the training and answer one
command at a time.
"""
