//! The groups under criterion.

use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput};

use crate::corpus::Corpus;
use crate::meter::Took;
use crate::{Error, GROUPS, Group, Outcome, Scale, Scratch};

pub(crate) fn run(scale: Scale) -> Outcome<()> {
    // Few samples of some operations each: the slow paths take up to a second for one.
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let scratch = Scratch::new(scale)?;
    let corpus = Corpus::write(&scratch)?;
    for setup in GROUPS {
        measure(&mut criterion, setup(&scratch, &corpus)?)?;
    }
    criterion.final_summary();
    Ok(())
}

fn measure(criterion: &mut Criterion, group: Group) -> Outcome<()> {
    let mut benchmarks = criterion.benchmark_group(group.name);
    benchmarks.sampling_mode(SamplingMode::Flat);
    let mut failure = None;
    for mut way in group.ways {
        benchmarks.throughput(Throughput::Elements(way.events));
        benchmarks.bench_function(way.name, |bencher| {
            bencher.iter_custom(|operations| time(&mut way.operation, operations, &mut failure));
        });
    }
    benchmarks.finish();
    failure.map_or(Ok(()), Err)
}

/// Criterion wants a time, whatever happens: after a failure, one so long that it soon has enough.
fn time(
    operation: &mut dyn FnMut() -> Outcome<Took>,
    operations: u64,
    failure: &mut Option<Error>,
) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..operations {
        let outcome = match failure {
            None => operation(),
            Some(_) => Ok(Took::only(Duration::from_secs(1))),
        };
        match outcome {
            Ok(took) => total += took.time,
            Err(error) => *failure = Some(error),
        }
    }
    total.max(Duration::from_nanos(1))
}
