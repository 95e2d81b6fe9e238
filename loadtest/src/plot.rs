//! Throughput and latency of a sweep as a picture.
//!
//! Texts are in a subset of DejaVu Sans that is part of the program, because a server has no fonts.

use std::path::Path;
use std::sync::Once;

use anyhow::anyhow;
use plotters::backend::{BitMapBackend, DrawingBackend, SVGBackend};
use plotters::chart::ChartBuilder;
use plotters::coord::Shift;
use plotters::coord::combinators::IntoLogRange;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::element::{Circle, PathElement};
use plotters::series::LineSeries;
use plotters::style::{Color, FontStyle, RGBColor, ShapeStyle, WHITE, register_font};

use crate::sweep::{Point, Sweep};

const SIZE: (u32, u32) = (860, 640);
const FONT: &str = "sans-serif";
static FONT_BYTES: &[u8] = include_bytes!("../assets/DejaVuSans-subset.ttf");

// Okabe and Ito's colours, which colour-blind people tell apart, too.
const BLUE: RGBColor = RGBColor(0, 114, 178);
const ORANGE: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);
const GREY: RGBColor = RGBColor(110, 110, 110);

/// A line of a chart: its name, its colour, and the value of a point.
type Line = (&'static str, RGBColor, fn(&Point) -> f64);

pub(crate) fn svg(sweep: &Sweep) -> anyhow::Result<String> {
    let mut text = String::new();
    draw(
        sweep,
        &SVGBackend::with_string(&mut text, SIZE).into_drawing_area(),
    )?;
    Ok(text)
}

pub(crate) fn png(sweep: &Sweep, file: &Path) -> anyhow::Result<()> {
    draw(sweep, &BitMapBackend::new(file, SIZE).into_drawing_area())
}

fn draw<B: DrawingBackend>(sweep: &Sweep, area: &DrawingArea<B, Shift>) -> anyhow::Result<()> {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        let registered = register_font(FONT, FontStyle::Normal, FONT_BYTES);
        assert!(
            registered.is_ok(),
            "the font is part of the program, and a test draws with it"
        );
    });
    let failed = |error: &dyn std::fmt::Display| anyhow!("draw the plot: {error}");
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    let (upper, lower) = area.split_vertically(SIZE.1 / 2);
    let title = format!(
        "requests/s over {} ({}, knee at {})",
        sweep.name(),
        sweep.scenario,
        sweep.knee
    );
    let best = highest(sweep, |point| point.rps);
    chart(
        sweep,
        &upper,
        &title,
        0.0..best,
        &[("closed loop", BLUE, |point| point.rps)],
    )
    .map_err(|error| failed(&error))?;
    let title = format!(
        "latency in ms at {:.0} % of that, from the intended send time",
        sweep.load_share * 100.0
    );
    let worst = highest(sweep, p99);
    chart(
        sweep,
        &lower,
        &title,
        0.0..worst,
        &[("p50", GREEN, p50), ("p99", ORANGE, p99)],
    )
    .map_err(|error| failed(&error))?;
    area.present().map_err(|error| failed(&error))
}

/// The upper end of an axis: a tenth above what is to be seen.
fn highest(sweep: &Sweep, of: fn(&Point) -> f64) -> f64 {
    let highest = sweep.points.iter().map(of).fold(0.0, f64::max);
    (highest * 1.1).max(f64::MIN_POSITIVE)
}

#[expect(clippy::cast_precision_loss, reason = "drawn, not counted")]
fn p50(point: &Point) -> f64 {
    point.latency.p50_us as f64 / 1e3
}

#[expect(clippy::cast_precision_loss, reason = "drawn, not counted")]
fn p99(point: &Point) -> f64 {
    point.latency.p99_us as f64 / 1e3
}

fn chart<B: DrawingBackend>(
    sweep: &Sweep,
    area: &DrawingArea<B, Shift>,
    title: &str,
    range: std::ops::Range<f64>,
    lines: &[Line],
) -> Result<(), plotters::drawing::DrawingAreaErrorKind<B::ErrorType>> {
    let x = |point: &Point| f64::from(point.value);
    let first = sweep.points.first().map_or(1.0, x);
    let last = sweep.points.last().map_or(1.0, x);
    // One value alone needs some width, too.
    let span = (first * 0.9)..(last * 1.1);
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 17))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(66)
        .build_cartesian_2d(span.log_scale(), range.clone())?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(sweep.name())
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|value| shown(*value))
        .label_style((FONT, 13))
        .draw()?;
    let knee = f64::from(sweep.knee);
    chart.draw_series([PathElement::new(
        [(knee, range.start), (knee, range.end)],
        GREY.stroke_width(1),
    )])?;
    for (name, colour, of) in lines {
        let points = sweep.points.iter().map(|point| (x(point), of(point)));
        let style = ShapeStyle::from(colour).stroke_width(2);
        let colour = *colour;
        chart
            .draw_series(LineSeries::new(points.clone(), style))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(points.map(|at| Circle::new(at, 3, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(GREY)
        .label_font((FONT, 13))
        .draw()
}

fn shown(value: f64) -> String {
    if value >= 10.0 || value == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use crate::sweep::tests::sweep;

    #[test]
    fn a_sweep_is_drawn_with_titles_and_all_points() {
        let sweep = sweep(&[1000.0, 1900.0, 3000.0, 3100.0]);
        let text = super::svg(&sweep).unwrap();
        for word in [
            "<svg",
            "requests/s over shards",
            "knee at 4",
            "p99",
            "closed loop",
        ] {
            assert!(text.contains(word), "{word} is missing");
        }
        assert_eq!(text.matches("<circle").count(), 3 * 4);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sweep.png");
        super::png(&sweep, &file).unwrap();
        let picture = std::fs::read(&file).unwrap();
        assert!(picture.starts_with(b"\x89PNG"));
        assert!(picture.len() > 10_000, "{} bytes", picture.len());
    }

    #[test]
    fn one_point_is_enough() {
        assert!(super::svg(&sweep(&[0.0])).unwrap().contains("<svg"));
    }
}
