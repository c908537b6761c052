"""Studies: several runs that differ in one thing, and what they show beside the published figures.

`plan` says what a study is, `folder` gathers what its runs have measured, `results` compares runs with the baseline and
with the paper, and `tables` and `page` show that.
"""
