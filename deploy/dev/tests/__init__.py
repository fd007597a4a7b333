"""Tests of `./dev`: python3 -m unittest discover -t deploy -s deploy/dev/tests"""
