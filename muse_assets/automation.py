"""When things run: the jobs, the daily schedule, the sensors that deploy and retrain.

Here: Dagster's words for it, and the sensors' decisions as pure functions beside them. Not here: what the
assets do.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
from dagster import DagsterRunStatus

from muse_assets.assets.failing import PASSING
from muse_assets.assets.index_lane import cluster_key, deployed_key, index_key
from muse_assets.assets.metadata import RETRAIN_ADVISED
from muse_assets.assets.playlist_cache import PLAYLIST_CACHE
from muse_assets.assets.run_processes import fail_dead_runs
from muse_assets.assets.server_reload import SERVER_RELOAD
from muse_assets.catalog import Catalog, IndexSpec
from muse_assets.failures import PassingFailure
from muse_assets.partitions import program_partitions
from muse_assets.publishing.pinning import Pin, read_pin
from muse_assets.seoul_time import SEOUL

DAILY = "daily"
REBUILD = "rebuild"
DEPLOY = "deploy"
PLAYLISTS = "playlists"
RELOAD = "reload"

# Every run has a process of its own, so one index cannot harm another; a second process a step would
# only add its start (2 to 8 s).
_EXECUTOR = dg.in_process_executor
_IN_PROGRESS = [
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]
_LOOK_BACK = 20
_BACKFILL_TAG = "dagster/backfill"
_BUILD_TAG = "muse/build"
_RETRAIN_TAG = "muse/retrain"

# After these a deploy that failed for a passing reason is launched again: a disk or a lock is usually back
# in minutes. Each launch has three tries of its own, over about a minute (`assets.failing`).
RETRY_PAUSES = (timedelta(minutes=2), timedelta(minutes=10), timedelta(minutes=30))


def build_jobs(catalog: Catalog) -> list[Any]:
    """The jobs an operator can launch; each runs with no configuration."""
    indexes = [index_key(spec) for spec in catalog.indexes]
    deployed = [deployed_key(spec) for spec in catalog.indexes]
    clusters = [cluster_key(spec) for spec in catalog.indexes]
    return [
        dg.define_asset_job(
            DAILY,
            dg.AssetSelection.assets(*indexes),
            executor_def=_EXECUTOR,
            description="One day's snapshot of every index, synced and validated; the sensor deploys them. "
            "Scheduled as one run an index, so that one bad table fails alone.",
        ),
        dg.define_asset_job(
            REBUILD,
            dg.AssetSelection.assets(*clusters, *indexes, *deployed),
            config={"ops": {key.to_python_identifier(): {"config": {"full": True}} for key in indexes}},
            executor_def=_EXECUTOR,
            description="First installation and recovery from nothing: train, build in full, deploy. Choose "
            "fewer indexes by materializing their three assets.",
        ),
        dg.define_asset_job(
            DEPLOY,
            dg.AssetSelection.assets(*deployed),
            executor_def=_EXECUTOR,
            description="Put the newest validated snapshots live; by configuration roll back, which pins the "
            "index until it is released (`release: true`, or `muse release`).",
        ),
        dg.define_asset_job(
            PLAYLISTS,
            dg.AssetSelection.assets(PLAYLIST_CACHE),
            executor_def=_EXECUTOR,
            description="Refresh the playlist keys of one program a partition.",
        ),
        dg.define_asset_job(
            RELOAD,
            dg.AssetSelection.assets(SERVER_RELOAD),
            executor_def=_EXECUTOR,
            description="Make the search server load the live files it has not loaded yet.",
        ),
    ]


def build_schedule(catalog: Catalog, *, running: bool) -> dg.ScheduleDefinition:
    """16:58 in Seoul, one run an index for that day's partition."""

    @dg.schedule(
        name="daily_1658",
        cron_schedule="58 16 * * *",
        execution_timezone="Asia/Seoul",
        job_name=DAILY,
        default_status=dg.DefaultScheduleStatus.RUNNING if running else dg.DefaultScheduleStatus.STOPPED,
        description="Every day at 16:58 (Seoul): today's partition of all indexes, one run each.",
    )
    def daily_1658(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
        day = context.scheduled_execution_time.astimezone(SEOUL).date().isoformat()
        for spec in catalog.indexes:
            yield dg.RunRequest(
                run_key=f"{DAILY}-{spec.name}-{day}",
                partition_key=day,
                asset_selection=[index_key(spec)],
                tags={"muse/index": spec.name, "muse/day": day},
            )

    return daily_1658


@dataclass(frozen=True)
class Event:
    """One build or deploy: its place in the event log, its day, whether it was a rollback, or under a pin."""

    storage_id: int
    partition: str
    rollback: bool = False
    pinned: bool = False


@dataclass(frozen=True)
class Cursor:
    """index -> storage id of the newest build dealt with; the newest deploy that was followed up."""

    builds: dict[str, int] = field(default_factory=dict)
    followed: int = 0


def read_cursor(text: str | None) -> Cursor:
    """The cursor as stored; a lost or unreadable one starts anew, since what is live is looked up."""
    try:
        content = json.loads(text or "{}")
        builds = {str(name): int(storage_id) for name, storage_id in content.get("builds", {}).items()}
        return Cursor(builds, int(content.get("followed", 0)))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return Cursor()


def write_cursor(cursor: Cursor) -> str:
    """The cursor as stored."""
    return json.dumps({"builds": cursor.builds, "followed": cursor.followed})


def build_to_deploy(seen: int, builds: Sequence[Event], deployed: Event | None) -> Event | None:
    """The build that should go live now, if any: the newest day's newest one, unless it was dealt with.

    Of an index that is not pinned (any more). A build that is older than the last deploy counts as dealt
    with when that deploy was of its day or a later one (in the same run, or by hand), or a rollback: what
    the server could not load stays back. A deploy under a pin says nothing once the pin is released.
    """
    if not builds:
        return None
    newest = max(builds, key=lambda event: (event.partition, event.storage_id))
    if deployed is not None and deployed.pinned:
        return newest
    return None if newest.storage_id <= seen or _superseded(newest, deployed) else newest


def _superseded(build: Event, deployed: Event | None) -> bool:
    if deployed is None:
        return False
    taken_back = deployed.rollback and deployed.storage_id > build.storage_id
    return taken_back or (deployed.partition, deployed.storage_id) > (build.partition, build.storage_id)


def cause_of_deploy(build: Event, deployed: Event | None) -> str:
    """What makes one deploy of a build another than the one before: after a release it goes live again."""
    released = f"-after-{deployed.storage_id}" if deployed and deployed.pinned else ""
    return f"{build.storage_id}{released}"


@dataclass(frozen=True)
class DeployRun:
    """One run that the sensor launched for a build. failed_at: None unless it failed.

    passing: whether it failed for a reason that may have gone; a killed run, which gave none, counts.
    """

    run_id: str
    failed_at: datetime | None = None
    passing: bool = True


@dataclass(frozen=True)
class NextTry:
    """What becomes of a build whose deploy failed: at a time (None: never of itself), and why."""

    number: int
    at: datetime | None
    reason: str


def next_try(runs: Sequence[DeployRun]) -> NextTry | None:
    """The next deploy of a build that is not live, after its `runs` so far, oldest first.

    None while there is nothing to repeat: no run yet, or one that has not failed.
    """
    if not runs or (failed_at := runs[-1].failed_at) is None:
        return None
    number, run = len(runs) + 1, f"run {runs[-1].run_id[:8]}"
    if not runs[-1].passing:
        return NextTry(number, None, f"refused ({run} says why and what to do)")
    if len(runs) > len(RETRY_PAUSES):
        return NextTry(number, None, f"failed {len(runs)} times (see {run}, then launch the job `deploy`)")
    at = failed_at + RETRY_PAUSES[len(runs) - 1]
    return NextTry(number, at, f"failed ({run}), try {number} at {at.astimezone(SEOUL):%H:%M:%S} Seoul")


def build_deploy_sensor(
    catalog: Catalog, jobs: Sequence[Any], server: Path, *, running: bool, reloads: bool
) -> dg.SensorDefinition:
    """One sensor for all indexes: deploys what was built, and after the last deploy reloads and refreshes.

    server: the search server's directory, where the pins are.
    """

    lanes = {key(spec) for spec in catalog.indexes for key in (cluster_key, index_key, deployed_key)}

    @dg.sensor(
        name="deploy_new_builds",
        jobs=jobs,
        # Every five seconds, the daemon's own rhythm: the day waits for two looks, 18 s of its 49 s at
        # 15 (which was often 20). A look costs 0.15 s of CPU, 2 % of one core more than at 15.
        minimum_interval_seconds=4,
        default_status=dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED,
        description="Deploys each newly validated build unless its index is pinned, and again after a "
        "failure that may pass. Once nothing is being built or deployed any more, reloads the search server "
        "and refreshes every program's playlist, once.",
    )
    def deploy_new_builds(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        instance = context.instance
        cursor = read_cursor(context.cursor)
        fail_dead_runs(instance)
        busy = _runs_in_progress(instance, lanes)
        if busy.get(REBUILD):
            return dg.SkipReason("waiting: a rebuild is running and deploys by itself")
        live = {spec.name: _newest(instance, deployed_key(spec)) for spec in catalog.indexes}
        requests, builds, not_live = [], dict(cursor.builds), []
        for spec in catalog.indexes:
            if pin := _pin(server, spec):
                # Not marked as seen: what is built meanwhile goes live after the release.
                not_live.append(f"{pin.describe()}; `muse release {spec.name}` lets new builds go live")
                continue
            seen = builds.get(spec.name, 0)
            found = _builds_of_newest_day(instance, index_key(spec))
            missing = build_to_deploy(0, found, live[spec.name])
            cause = cause_of_deploy(missing, live[spec.name]) if missing else ""
            runs = _deploy_runs(instance, spec, cause) if missing else []
            again = next_try(runs)
            if not runs and (new := build_to_deploy(seen, found, live[spec.name])):
                requests.append(_deploy_request(spec, new, cause))
            elif missing and again and again.at and again.at <= datetime.now(UTC):
                requests.append(_deploy_request(spec, missing, cause, again.number))
            elif missing and again:
                not_live.append(f"the deploy of {spec.name} {missing.partition} {again.reason}")
            builds[spec.name] = max([seen, *(event.storage_id for event in found)])
        if requests:
            return dg.SensorResult(
                run_requests=requests, cursor=write_cursor(Cursor(builds, cursor.followed))
            )
        newest_deploy = max((event.storage_id for event in live.values() if event), default=0)
        if newest_deploy <= cursor.followed:
            return dg.SensorResult(
                skip_reason="; ".join(not_live)
                or "nothing new: every validated build is live and was followed up",
                cursor=write_cursor(Cursor(builds, cursor.followed)),
            )
        if busy:
            running_now = ", ".join(f"{n} of {job}" for job, n in busy.items())
            waiting = f"waiting for the day's last deploy: in progress {running_now}"
            return dg.SensorResult(
                skip_reason="; ".join([waiting, *not_live]),
                cursor=write_cursor(Cursor(builds, cursor.followed)),
            )
        return dg.SensorResult(
            run_requests=_after_deploys(catalog, newest_deploy, reloads=reloads),
            cursor=write_cursor(Cursor(builds, newest_deploy)),
        )

    return deploy_new_builds


@dataclass(frozen=True)
class Build:
    """The newest build of an index, as far as a retrain depends on it.

    cluster: fingerprint of what it was filled into; advised: whether its check `drift` warned.
    """

    cluster: str
    advised: bool


@dataclass(frozen=True)
class RetrainRun:
    """A run that the sensor launched to retrain a cluster; status: as Dagster has it."""

    run_id: str
    status: str


def in_quiet_hours(now: datetime, hours: tuple[int, int]) -> bool:
    """Whether `now` is within Seoul's hours, the first to before the second; equal ones are the whole day."""
    first, end = hours
    hour = now.astimezone(SEOUL).hour
    return first <= hour < end if first < end else hour >= first or hour < end


def why_not_retrained(
    build: Build | None, *, pin: Pin | None, failed: str | None, run: RetrainRun | None
) -> str | None:
    """Why an index with `auto_retrain` is left as it is; None where it should be retrained now.

    failed: id of the newest build's run, if that is newer than the newest build and failed; run: what was
    launched for this cluster. Another embedding model fails the build: a retrain then would put a mixture
    of two models live.
    """
    if build is None or not build.advised:
        return "not drifted"
    if run is not None:
        tried = f"run {run.run_id[:8]}: {run.status.lower()}"
        return f"drifted, and was retrained once for this cluster ({tried}); from here on it is by hand"
    if pin is not None:
        return "drifted, but pinned"
    if failed is not None:
        return f"drifted, but its newest build failed (run {failed[:8]})"
    return None


def build_retrain_sensor(
    catalog: Catalog, jobs: Sequence[Any], server: Path, *, hours: tuple[int, int], running: bool
) -> dg.SensorDefinition:
    """One sensor for all indexes with `auto_retrain`: a rebuild of one that has drifted, at night.

    server: the search server's directory, where the pins are. There is no cursor: what was launched is read
    from the runs.
    """
    lanes = {key(spec) for spec in catalog.indexes for key in (cluster_key, index_key, deployed_key)}
    chosen = [spec for spec in catalog.indexes if spec.auto_retrain]
    window = f"{hours[0]:02d}:00 to {hours[1]:02d}:00 Seoul"

    @dg.sensor(
        name="retrain_drifted",
        jobs=[job for job in jobs if job.name == REBUILD],
        minimum_interval_seconds=600,
        default_status=dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED,
        description=f"Between {window}, and while nothing else runs: trains, builds and deploys an index "
        "whose newest build was warned of drift, where its `auto_retrain` is on. One index at a time, once a "
        "cluster; never a pinned one, nor one whose newest build failed.",
    )
    def retrain_drifted(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        now = datetime.now(UTC)
        if not chosen:
            return dg.SkipReason("no index of the catalog has auto_retrain")
        if not in_quiet_hours(now, hours):
            return dg.SkipReason(f"retrains are for {window}")
        fail_dead_runs(context.instance)
        if busy := _runs_in_progress(context.instance, lanes, backfills=True):
            return dg.SkipReason(
                f"waiting: in progress {', '.join(f'{n} of {job}' for job, n in busy.items())}"
            )
        reasons = []
        for spec in chosen:
            build, failed = _newest_build(context.instance, spec)
            run = _retrain_run(context.instance, spec, build.cluster) if build else None
            why_not = why_not_retrained(build, pin=_pin(server, spec), failed=failed, run=run)
            if build and why_not is None:
                return _retrain_request(spec, build.cluster, now.astimezone(SEOUL).date().isoformat())
            reasons.append(f"{spec.name}: {why_not}")
        return dg.SkipReason("; ".join(reasons))

    return retrain_drifted


def _retrain_request(spec: IndexSpec, cluster: str, day: str) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=f"retrain-{spec.name}-{cluster}",
        job_name=REBUILD,
        partition_key=day,
        asset_selection=[cluster_key(spec), index_key(spec), deployed_key(spec)],
        run_config={"ops": {index_key(spec).to_python_identifier(): {"config": {"full": True}}}},
        tags={"muse/index": spec.name, "muse/day": day, _RETRAIN_TAG: _short(cluster)},
    )


def _short(cluster: str) -> str:
    """A tag takes at most 63 characters, a fingerprint has 64."""
    return cluster[:32]


def _retrain_run(instance: dg.DagsterInstance, spec: IndexSpec, cluster: str) -> RetrainRun | None:
    wanted = dg.RunsFilter(tags={"muse/index": spec.name, _RETRAIN_TAG: _short(cluster)})
    for run in instance.get_runs(wanted, limit=1):
        return RetrainRun(run.run_id, run.status.value)
    return None


def _newest_build(instance: dg.DagsterInstance, spec: IndexSpec) -> tuple[Build | None, str | None]:
    """The newest build of the newest day, and the id of a failed run since, if there is one."""
    key = index_key(spec)
    for day in sorted(instance.get_materialized_partitions(key), reverse=True):
        wanted = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[day])
        for record in instance.fetch_materializations(wanted, limit=_LOOK_BACK).records:
            metadata = record.asset_materialization.metadata if record.asset_materialization else {}
            if cluster := _value(metadata, "cluster"):
                build = Build(str(cluster), bool(_value(metadata, RETRAIN_ADVISED)))
                return build, _failed_since(instance, spec, record.timestamp)
    return None, None


def _failed_since(instance: dg.DagsterInstance, spec: IndexSpec, timestamp: float) -> str | None:
    """Id of the newest build's run, if it failed after `timestamp` (seconds since the epoch)."""
    wanted = dg.RunsFilter(job_name=DAILY, tags={"muse/index": spec.name})
    for record in instance.get_run_records(wanted, limit=1):
        run = record.dagster_run
        if run.status == DagsterRunStatus.FAILURE and _failed_at(record).timestamp() > timestamp:
            return run.run_id
    return None


def _pin(server: Path, spec: IndexSpec) -> Pin | None:
    """None also while the directory cannot be read: the deploy then says so, red."""
    try:
        return read_pin(server, spec.name)
    except PassingFailure:
        return None


def _deploy_request(spec: IndexSpec, build: Event, cause: str, number: int = 1) -> dg.RunRequest:
    again = f"-{number}" if number > 1 else ""
    return dg.RunRequest(
        run_key=f"{DEPLOY}-{spec.name}-{cause}{again}",
        job_name=DEPLOY,
        asset_selection=[deployed_key(spec)],
        run_config=asset_config(deployed_key(spec), partition=build.partition),
        tags=_build_tags(spec, cause) | {"muse/day": build.partition},
    )


def _build_tags(spec: IndexSpec, cause: str) -> dict[str, str]:
    return {"muse/index": spec.name, _BUILD_TAG: cause}


def _deploy_runs(instance: dg.DagsterInstance, spec: IndexSpec, cause: str) -> list[DeployRun]:
    """Oldest first. From the runs and not from the cursor, which may be lost."""
    wanted = dg.RunsFilter(job_name=DEPLOY, tags=_build_tags(spec, cause))
    return [
        DeployRun(run.run_id, _failed_at(record), not _refused(instance, run.run_id))
        if (run := record.dagster_run).status == DagsterRunStatus.FAILURE
        else DeployRun(run.run_id)
        for record in instance.get_run_records(wanted, ascending=True)
    ]


def _failed_at(record: dg.RunRecord) -> datetime:
    return (
        datetime.fromtimestamp(record.end_time, UTC)
        if record.end_time
        else record.update_timestamp.replace(tzinfo=UTC)
    )


def _refused(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether a step of the run failed for a reason that does not pass (`assets.failing`)."""
    entries = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    failures = (entry.get_dagster_event().step_failure_data.user_failure_data for entry in entries)
    return any(failure is not None and _value(failure.metadata, PASSING) is False for failure in failures)


def asset_config(key: dg.AssetKey, **options: Any) -> dict[str, Any]:
    """Run config of one asset."""
    return {"ops": {key.to_python_identifier(): {"config": options}}}


def _after_deploys(catalog: Catalog, deploy: int, *, reloads: bool) -> list[dg.RunRequest]:
    reload = [dg.RunRequest(run_key=f"{RELOAD}-{deploy}", job_name=RELOAD)] if reloads else []
    return reload + [
        dg.RunRequest(
            run_key=f"{PLAYLISTS}-{deploy}-{program}",
            job_name=PLAYLISTS,
            partition_key=program,
            tags={"muse/program": program},
        )
        for program in program_partitions(catalog).get_partition_keys()
    ]


def _runs_in_progress(
    instance: dg.DagsterInstance, lanes: AbstractSet[dg.AssetKey], *, backfills: bool = False
) -> Mapping[str, int]:
    """Job -> runs that may still bring a deploy today.

    Not other teams' runs, nor, unless asked for, a backfill: they could hold back the reload and the
    playlists for hours.
    """
    counts: dict[str, int] = {}
    for run in instance.get_runs(dg.RunsFilter(statuses=_IN_PROGRESS)):
        ours = run.job_name in (DAILY, REBUILD, DEPLOY) or bool(lanes & (run.asset_selection or set()))
        if ours and (backfills or _BACKFILL_TAG not in run.tags):
            counts[run.job_name] = counts.get(run.job_name, 0) + 1
    return counts


def _builds_of_newest_day(instance: dg.DagsterInstance, key: dg.AssetKey) -> list[Event]:
    """By day and not by time: a backfill of old days may have pushed the newest far down the log."""
    days = sorted(instance.get_materialized_partitions(key), reverse=True)
    found = (_events(instance, dg.AssetRecordsFilter(asset_key=key, asset_partitions=[day])) for day in days)
    return next(filter(None, found), [])


def _newest(instance: dg.DagsterInstance, key: dg.AssetKey) -> Event | None:
    return next(iter(_events(instance, key)), None)


def _events(instance: dg.DagsterInstance, key: dg.AssetKey | dg.AssetRecordsFilter) -> list[Event]:
    """Newest first. A materialization without our metadata was reported by hand: it made no file."""
    return [
        Event(
            record.storage_id,
            str(partition),
            rollback=bool(_value(metadata, "rollback")),
            pinned=bool(_value(metadata, "pinned")),
        )
        for record in instance.fetch_materializations(key, limit=_LOOK_BACK).records
        if record.asset_materialization and "sha256" in (metadata := record.asset_materialization.metadata)
        if (partition := record.partition_key or _value(metadata, "partition"))
    ]


def _value(metadata: Mapping[str, dg.MetadataValue[Any]], name: str) -> Any:
    return metadata[name].value if name in metadata else None
