"""Pages that show what runs achieved. `build_report` makes a run's report.html; studies share its templates.

`run` and `findings` gather what a report says, `inputs` reads the run's files, `charts` and `page` draw and render, and
`templates` holds the words and the markup.
"""

from harmonic.report.run import build_report

__all__ = ["build_report"]
