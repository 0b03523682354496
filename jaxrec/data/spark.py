"""Spark as the engine, for logs that outgrow one machine: the same ibis code as on DuckDB, and the same results.

Needs the extra `spark` and Java 17 or newer; see docs/pairs.md.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import ibis
import pyarrow as pa
from ibis.backends import BaseBackend

from jaxrec.config import UserError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def connect_spark(session: "SparkSession | None" = None, memory: str = "4g") -> BaseBackend:
    """An ibis backend on Spark.

    Intermediate results are tables `ibis_jaxrec_...` of the session's current database, dropped after use.

    Args:
      session: the session of a cluster, whose time zone is set to UTC; by default the one that is active in this
        process or, if there is none, a local one on all cores, which keeps its files in a temporary folder and
        stops when the process ends.
      memory: of a local session that is started here, as Java writes it.

    Raises:
      UserError: the extra `spark` is not installed, there is no Java, or it doesn't start.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise UserError(
            "Spark is not installed; install it with `make setup-spark` or `pip install jaxrec[spark]`"
        ) from error
    session = session or SparkSession.getActiveSession() or _start(memory)
    # Rows come to Python as Arrow batches, not one by one.
    return ibis.pyspark.connect(session, **{"spark.sql.execution.arrow.pyspark.enabled": "true"})


def store_rows(engine: BaseBackend, table: pa.Table, name: str) -> ibis.Table:
    """Writes rows in memory as a table. ibis's own way is through pandas, where integers with nulls become floats."""
    session = engine.raw_sql("SELECT 1").sparkSession
    session.createDataFrame(table).write.saveAsTable(name)
    return engine.table(name)


def _start(memory: str) -> "SparkSession":
    """A session inside this process that listens on loopback only."""
    from pyspark.errors import PySparkRuntimeError
    from pyspark.sql import SparkSession

    _check_java()
    folder = Path(tempfile.mkdtemp(prefix="jaxrec-spark-"))
    options = {
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.memory": memory,
        # Results are small beside the log, and cap_pairs needs all of them.
        "spark.driver.maxResultSize": "0",
        "spark.local.dir": folder,
        "spark.sql.warehouse.dir": folder / "tables",
        "spark.sql.catalogImplementation": "in-memory",
        # Enough to keep the cores busy; Spark's 200 are for a cluster, and cost seconds a query here.
        "spark.sql.shuffle.partitions": max(8, 2 * (os.cpu_count() or 1)),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
    }
    builder = SparkSession.builder.master("local[*]").appName("jaxrec")
    for name, value in options.items():
        builder = builder.config(name, str(value))
    try:
        session = builder.getOrCreate()
    except PySparkRuntimeError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError("Spark did not start; it needs Java 17 or newer, see the lines above") from error
    # Last in, first out: the session ends before its folder goes.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(session.stop)
    return session


def _check_java() -> None:
    home = os.environ.get("JAVA_HOME")
    if home and not (Path(home) / "bin" / "java").is_file():
        raise UserError(f"JAVA_HOME is {home}, which holds no bin/java; set it to the folder of Java 17 or newer")
    if not home and shutil.which("java") is None:
        raise UserError("Spark needs Java, and there is none on the PATH; install Java 17 or newer or set JAVA_HOME")
