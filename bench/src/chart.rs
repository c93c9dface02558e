//! How a hand-over's time grows with the number of contenders, as a picture.

use std::fmt::Write as _;

/// Points of both clients: contenders, and microseconds per hand-over.
#[derive(Default)]
pub(crate) struct Growth {
    ours: Vec<(usize, f64)>,
    go: Vec<(usize, f64)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 50.0;

impl Growth {
    pub(crate) fn add(&mut self, is_go: bool, contenders: usize, micros: f64) {
        if is_go { self.go.push((contenders, micros)) } else { self.ours.push((contenders, micros)) }
    }

    /// Both axes are logarithmic.
    pub(crate) fn svg(&self, version: &str) -> String {
        let x = |contenders: usize| LEFT + (WIDTH - LEFT - RIGHT) * ((contenders as f64).log2() - 1.0) / 5.0;
        let y = |micros: f64| TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - (micros.log10() - 2.0) / 3.0);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
             <text x=\"{LEFT}\" y=\"24\" font-size=\"16\" font-weight=\"bold\">Time per hand-over</text>\n\
             <text x=\"{LEFT}\" y=\"44\" fill=\"#555\">one lock wanted by many processes all the time; {version}</text>\n"
        );
        for (micros, label) in [(100.0, "0.1 ms"), (1e3, "1 ms"), (1e4, "10 ms"), (1e5, "100 ms")] {
            let (y, end) = (y(micros), WIDTH - RIGHT);
            let _ = writeln!(svg, "<line x1=\"{LEFT}\" x2=\"{end}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>");
            let _ = writeln!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", LEFT - 8.0, y + 4.0);
        }
        for contenders in [2, 4, 8, 16, 32, 64] {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{contenders}</text>",
                x(contenders),
                HEIGHT - 28.0
            );
        }
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\" fill=\"#555\">processes</text>", WIDTH - RIGHT + 14.0, HEIGHT - 28.0);
        for (points, colour, label) in [(&self.go, "#b5651d", "Go's Mutex"), (&self.ours, "#1a6fb5", "etcdlock")] {
            let Some((last, micros)) = points.last() else { continue };
            let line: Vec<_> = points.iter().map(|(n, micros)| format!("{:.1},{:.1}", x(*n), y(*micros))).collect();
            let _ =
                writeln!(svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2.5\"/>", line.join(" "));
            for (n, micros) in points {
                let ms = micros / 1e3;
                let ms = if ms < 10.0 { format!("{ms:.2}") } else { format!("{ms:.0}") };
                let (x, y) = (x(*n), y(*micros));
                let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>");
                let _ = writeln!(
                    svg,
                    "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"11\" fill=\"{colour}\">{ms}</text>",
                    y - 9.0
                );
            }
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{label}</text>",
                x(*last) + 12.0,
                y(*micros) + 4.0
            );
        }
        svg + "</svg>\n"
    }
}
