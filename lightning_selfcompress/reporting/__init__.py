"""Reports of runs: what was recorded, the front of accuracy against bytes, and one HTML file that shows both.

- ``front``: which points no other beats in both metric and bytes.
- ``history``: the record of one run, from its folder or from a callback.
- ``event_files`` and ``csv_files``: scalars and bits in the files of loggers.
- ``run_folder``: the record of a run in a folder.
- ``page`` and ``sweep_page``: the record of one run, or of several, as HTML; the templates lie in ``template``.
- ``pareto_checkpoint`` and ``compression_report``: the callbacks.
- ``sweep_plan``, ``sweep_config`` and ``sweep``: one training script for each of several sizes or gammas.
"""
