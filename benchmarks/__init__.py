"""Benchmarks. Run one from the root of the repository, for example `python -m benchmarks.sampling --help`.

Each benchmark prints tables for people, and as its last line the same numbers as JSON.
"""

import console

console.import_tensorflow()
