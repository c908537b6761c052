"""Studies: several runs that differ in one thing, compared with one another and with the published figures.

`plan` defines a study, `folder` gathers what its runs have measured, `results` compares runs with the baseline and
with the paper, and `tables` and `page` show that.
"""
