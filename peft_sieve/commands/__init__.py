"""The commands of `peft-sieve`, a file each.

A command is a module with `NAME`, `HELP` (one line), `EXAMPLES` (shown below its options), `add_arguments(parser)` and
`run(args) -> int`, the exit code. It imports what it works with inside `run`, so that neither `--help` nor the other
commands wait for it. What several commands share lies beside them: `loading`, `options`, `output`.
"""
