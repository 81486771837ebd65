"""Print the named columns of a CSV on standard input:  columns.py name final < predictions/predict.csv"""

import csv
import sys

rows = csv.DictReader(sys.stdin)
writer = csv.DictWriter(sys.stdout, sys.argv[1:], extrasaction="ignore", lineterminator="\n")
writer.writeheader()
writer.writerows(rows)
